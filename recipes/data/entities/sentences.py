"""Sentences with places for names, and the names: all written for this project, each split with its own."""

from __future__ import annotations

TRAIN = """
{PER} moved from {LOC} to {LOC} when the children were small .
The papers went to {PER} at {ORG} , who never answered .
{ORG} has opened a second office in {LOC} .
Please call {PER} back before the end of the day .
We flew to {LOC} and took the bus to {LOC} .
Nobody at {ORG} could tell me where the parcel was .
{PER} and {PER} met at a conference in {LOC} .
The contract with {ORG} ends in June .
My sister works for {ORG} , near the harbour of {LOC} .
" I have never been to {LOC} , " said {PER} .
According to {PER} , the bridge at {LOC} is closed for repairs .
{ORG} and {ORG} have agreed to share a warehouse .
Is {PER} still the head of sales ?
It rained in {LOC} for nine days .
{PER} ( {ORG} ) will give the second talk .
The train to {LOC} leaves from platform four .
Ask {PER} whether the invoice from {ORG} has been paid .
Dr {PER} runs a small clinic outside {LOC} .
Shares of {ORG} fell by six percent on Tuesday .
A letter from {LOC} arrived this morning , with no sender .
{PER} , who grew up in {LOC} , now teaches at a school in {LOC} .
I bought these boots from {ORG} two winters ago .
The mayor of {LOC} thanked {PER} for her work .
{ORG} is looking for drivers in {LOC} and {LOC} .
Did you know that {PER} used to be a dancer ?
Mrs {PER} has sold her flat in {LOC} .
Our supplier , {ORG} , has raised its prices again .
{PER} wrote three novels , all of them set in {LOC} .
The museum in {LOC} bought two paintings by {PER} .
{ORG} will not comment on the accident .
From {LOC} it is another forty miles to {LOC} .
{PER} signed for the goods on behalf of {ORG} .
Yesterday {PER} resigned as a director of {ORG} .
The workers at {ORG} have voted for a strike .
There is a direct ferry between {LOC} and {LOC} .
Thanks to {PER} the garden looks better than ever .
{LOC} is colder than {LOC} , but drier .
He asked {PER} to drive him to {LOC} .
Engineers from {ORG} inspected the dam above {LOC} .
This recipe was my grandmother's ; she had it from {PER} .
{PER} is on leave until Monday , so write to {PER} instead .
The court in {LOC} ruled against {ORG} .
Bring a coat , the evenings are cold .
The meeting has been moved to the larger room .
Nothing in the report explains the delay .
Could someone please water the plants ?
The old printer is broken again , and so is the new one .
After lunch we went back to the archive .
Our {LOC} team has won the cup twice .
Flights from {LOC} were cancelled because of fog .
{PER} plays the cello , her brother {PER} the drums .
I was told that {ORG} repairs such clocks .
Mr {PER} of {ORG} denied everything .
The road over the pass to {LOC} is open again .
With a loan from {ORG} , {PER} bought the mill .
In {LOC} you can see both seas from the tower .
Send one copy to {ORG} , and keep the other .
Even {PER} had to laugh .
She studied in {LOC} before she joined {ORG} .
The first prize went to {PER} from {LOC} .
"""

VALIDATION = """
{PER} has written to {ORG} about the broken lift .
Two buses a day run from {LOC} to the coast .
{ORG} hired {PER} as its new accountant .
The fire in {LOC} was put out by noon .
I shared a room with {PER} for a year .
Who owns {ORG} now ?
{PER} was born in {LOC} .
The chairs were made by {ORG} in {LOC} .
Tell {PER} that the keys are under the mat .
Of all towns on the river , {LOC} is the oldest .
The windows need new frames .
{ORG} sued {ORG} over the name of a biscuit .
"""

TEST = """
{PER} left {ORG} last autumn and started a bakery .
Snow has cut {LOC} off from the valley .
We stayed with {PER} in {LOC} for a week .
The complaint against {ORG} was withdrawn .
Has anyone heard from {PER} since the party ?
{ORG} builds its engines in {LOC} .
A concert by {PER} has been announced in {LOC} .
{PER} told reporters that {ORG} would appeal .
The film was shot in {LOC} , {LOC} and on the open sea .
Her lawyer , {PER} , did not want to speak .
{ORG} is closing its branch in {LOC} at the end of March .
You will find {PER} behind the counter most days .
Pilgrims walk to {LOC} every spring .
The engine was delivered by {ORG} , one month late .
{PER} lost her passport somewhere near {LOC} .
Professor {PER} has advised {ORG} for many years .
A bus from {LOC} overturned , but nobody was hurt .
{PER} thinks that {PER} should be captain .
Half of the village is employed by {ORG} .
There was no light in the hall , and no sound .
The dog slept through all of it .
Tickets cost twelve and can be bought at the door .
According to a spokesman for {ORG} , the pipes in {LOC} are safe .
The winner , {PER} , trained in {LOC} with {PER} .
"""

NAMES = {
    "train": {
        "PER": (
            "Anna Bruno Carla Dmitri Elena Farid Greta Hugo Ingrid Jonas Katrin Leon Marta Nils Olga Pedro Rita Stefan"
            " Tilda Viktor Wanda Yusuf Zora Amara Boris",
            "Albers Baumann Castell Dahl Engstrom Ferrara Gellert Hoffner Ivarsen Jurado Keller Lindqvist Moreau Novak"
            " Osterman Petrov Quist Rossi Sandoval Tamm Ullman Varga Weiss Yilmaz Zeman",
        ),
        "LOC": "Lisbon|Oslo|Vienna|Tartu|Graz|Porto|Malmo|Lyon|Bilbao|Krakow|Ghent|Turin|Aarhus|Zadar|Split|Cork|Leeds"
        "|Nantes|Basel|Vigo|Odense|Linz|Poznan|Rouen|Ancona|Narva|Derby|Perth|Namur|Sibiu|New Haven|Port Arden"
        "|San Telmo|Lake Orrin|Fort Willow|North Sele|East Marren|Saint Olin|Upper Thorne|Cape Dunn",
        "ORG": (
            "Halden Corvus Norvik Meyer Silverline Tessera Gruber Baltic Orion Kestrel Redwood Alpha Wexford Quantex"
            " Sunrise Delta Helvar Marlow Pinecrest Atlas Summit Brunner Cobalt Falcon Larsson Trident Aurora Hollis"
            " Zephyr Maple",
            "Freight Shipping Optics Bank Books Labs Timber Foods Airlines Insurance Dairy Tools Motors Paper Textiles"
            " Farms Media Software Hotels Brothers",
        ),
    },
    "validation": {
        "PER": ("Claire Edgar Frida Gustav Helga", "Abrams Bellini Cordes Drost Eklund"),
        "LOC": "Trieste|Umea|Bruges|Old Marsh|Mont Aubin|Kaunas",
        "ORG": ("Falk Ostrow Bluebird Zenita Hartmann Ferro", "Machines Glass Coffee Press Steel Partners"),
    },
    "test": {
        "PER": (
            "Agnes Benedikt Cecilia Daniel Esther Felix Hanna Igor Johanna Klaus Lidia Magnus",
            "Arnesen Brandl Costa Duarte Erdmann Fischer Gallo Holm Jansen Kovacs Lund Marek",
        ),
        "LOC": "Bergen|Valencia|Dresden|Tampere|Palermo|Bristol|Riga|Gdansk|Isle Ellery|Monte Alto"
        "|Vesper Falls|West Holt",
        "ORG": (
            "Nordlys Harper Castor Vega Stonebridge Lumen Tiber Anders Polaris Mistral Greenfield Osk",
            "Energy Mills Pharma Cement Cycles Rail Seeds Systems Logistics Chemicals",
        ),
    },
}
"""Of persons first names and surnames, of firms the two parts of a name, of places whole names."""
