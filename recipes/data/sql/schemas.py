"""The schemas that generate.py asks about: tables, columns and the English that fits them.

A clause is written with a plural verb and `{}` where the value goes ("are based in {}").
Plain verbs are read by the generator: "are in {}" becomes "in {}" after a noun and
"have {}" becomes "with {}".  `{#}` in a quantity marks something counted ("fewer than"),
`{}` something measured ("less than").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["label", "text", "number", "year", "date"]
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Column:
    """One column, with the words that stand for it in a question."""

    name: str
    kind: Kind
    noun: str
    nouns: str
    clause: str = ""
    values: tuple[str, ...] = ()
    low: float = 0
    high: float = 0
    step: float = 1
    adjectives: tuple[str, str] = ("highest", "lowest")
    superlatives: tuple[str, str] | None = None
    additive: bool = False

    @property
    def sql_type(self) -> str:
        if self.kind in ("label", "text", "date"):
            return "TEXT"
        return "REAL" if isinstance(self.step, float) else "INTEGER"


@dataclass(frozen=True)
class Table:
    """One table; the first of its columns is the one that names a row."""

    name: str
    singular: str
    plural: str
    columns: tuple[Column, ...]
    person: bool = False
    quoted: bool = False
    with_id: bool = True

    @property
    def label(self) -> Column:
        return self.columns[0]

    @property
    def relative(self) -> str:
        return "who" if self.person else "that"


@dataclass(frozen=True)
class Link:
    """How a table refers to its parent, in SQL and in English."""

    parent: Table
    key: str
    clause: str


@dataclass(frozen=True)
class Schema:
    """One table, or a table with a parent, in one split."""

    split: Split
    table: Table
    link: Link | None = None

    @property
    def tables(self) -> tuple[Table, ...]:
        return (self.link.parent, self.table) if self.link else (self.table,)


FIRST_NAMES = (
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Elena",
    "Felix",
    "Grace",
    "Hugo",
    "Iris",
    "Jonas",
    "Kate",
    "Liam",
    "Maya",
    "Noah",
    "Olga",
    "Paul",
    "Rosa",
    "Sam",
    "Tara",
    "Victor",
)
LAST_NAMES = (
    "Adler",
    "Baker",
    "Cole",
    "Diaz",
    "Evans",
    "Fox",
    "Gray",
    "Hill",
    "Irwin",
    "Jones",
    "Klein",
    "Lopez",
    "Moss",
    "Novak",
    "Owens",
    "Price",
    "Reed",
    "Stone",
    "Turner",
    "Walsh",
)


def _pair(words: str) -> tuple[str, str]:
    """ "city/cities" gives both; one word alone takes an s."""
    singular, _, plural = words.partition("/")
    return singular, plural or singular + "s"


def _names(first: str, second: str = "", joint: str = " ", column: str = "name") -> Column:
    """A label column whose values are every `first` joined to every `second`."""
    heads, tails = first.split(","), second.split(",") if second else []
    values = [head + joint + tail for head in heads for tail in tails] or heads
    nouns = column + ("es" if column.endswith("s") else "s")
    return Column(column, "label", column, nouns, values=tuple(values))


def _titles(first: str, second: str) -> Column:
    return _names(first, second, column="title")


def _codes(first: str, second: str) -> Column:
    return _names(first, second, joint="", column="code")


def _people() -> Column:
    return _names(",".join(FIRST_NAMES), ",".join(LAST_NAMES))


def _text(name: str, words: str, clause: str, values: str) -> Column:
    noun, nouns = _pair(words)
    return Column(name, "text", noun, nouns, clause, tuple(values.split(",")))


def _number(
    name: str,
    words: str,
    low: float,
    high: float,
    step: float,
    clause: str = "",
    adjectives: str = "highest/lowest",
    superlatives: str = "",
    additive: bool = False,
) -> Column:
    noun, nouns = _pair(words)
    return Column(
        name,
        "number",
        noun,
        nouns,
        clause,
        (),
        low,
        high,
        step,
        _pair(adjectives),
        _pair(superlatives) if superlatives else None,
        additive,
    )


def _year(name: str, words: str, clause: str, low: int, high: int, superlatives: str = "") -> Column:
    noun, nouns = _pair(words)
    extreme = _pair(superlatives) if superlatives else None
    return Column(name, "year", noun, nouns, clause, (), low, high, 1, ("latest", "earliest"), extreme)


def _date(name: str, words: str, clause: str, low: int, high: int) -> Column:
    """A date between the start of the year `low` and the end of the year `high`."""
    noun, nouns = _pair(words)
    return Column(name, "date", noun, nouns, clause, (), low, high, 1, ("latest", "earliest"))


def _table(
    name: str,
    words: str,
    *columns: Column,
    person: bool = False,
    quoted: bool = False,
    with_id: bool = True,
) -> Table:
    return Table(name, *_pair(words), columns, person, quoted, with_id)


# fmt: off
TRAIN_TABLES = (
    _table("staff", "staff member", _people(),
           _text("city", "home city/home cities", "live in {}", "Leeds,York,Bristol,Cardiff,Derby"),
           _text("department", "department", "work in {}", "sales,finance,support,design"),
           _number("salary", "salary/salaries", 22000, 64000, 500, "earn {}"),
           _date("hired", "hire date", "were hired {}", 2016, 2023), person=True),
    _table("books", "book", _titles("Silent,Golden,Broken,Winter,Paper,Hidden", "River,Garden,Hour,Crown,Letter"),
           _text("genre", "genre", "are in the {} genre", "fantasy,crime,history,romance,poetry"),
           _number("pages", "page count", 90, 720, 5, "have {#} pages", superlatives="longest/shortest"),
           _year("year", "publication year", "were published {}", 1950, 2022, "newest/oldest"),
           _number("price", "price", 4.5, 32.0, 0.5, "cost {} pounds"), quoted=True, with_id=False),
    _table("flights", "flight", _codes("BX,KL,TR,QM", "204,318,455,617,702,931"),
           _text("destination", "destination", "go to {}", "Rome,Oslo,Cairo,Lima,Tokyo"),
           _number("minutes", "duration", 50, 720, 5, "last {} minutes", "longest/shortest"),
           _number("seats", "seat count", 60, 380, 4, "have {#} seats", additive=True),
           _date("departs", "departure date", "depart {}", 2023, 2024), with_id=False),
    _table("recipes", "recipe", _names("Lemon,Spicy,Smoky,Garden,Autumn,Quick", "Soup,Stew,Tart,Salad,Noodles"),
           _text("cuisine", "cuisine", "belong to {} cuisine", "Thai,Greek,Mexican,Indian,French"),
           _number("minutes", "cooking time", 10, 180, 5, "take {} minutes", "longest/shortest"),
           _number("servings", "number of servings/numbers of servings", 2, 30, 1, "make {#} servings"),
           _number("calories", "calorie count", 150, 950, 10, "have {#} calories")),
    _table("cars", "car", _names("Arden,Belmo,Corvel,Dantor,Estra", "GT,Mini,Sport,Plus,City", column="model"),
           _text("fuel", "fuel type", "run on {}", "petrol,diesel,electricity,hydrogen"),
           _text("color", "color", "are {}", "red,blue,silver,black,white"),
           _number("price", "price", 8000, 72000, 500, "cost {} dollars", superlatives="most expensive/cheapest"),
           _year("year", "model year", "were made {}", 1998, 2023, "newest/oldest")),
    _table("films", "film", _titles("Last,Crimson,Distant,Electric,Frozen,Little", "Voyage,Summer,Shadow,Bridge,Dance"),
           _text("director", "director", "were directed by {}", "Ada Holm,Leo Marsh,Nina Roy,Omar Vale"),
           _number("minutes", "running time", 75, 190, 1, "run for {} minutes", "longest/shortest", "longest/shortest"),
           _year("year", "release year", "were released {}", 1970, 2023), quoted=True),
    _table("students", "student", _people(),
           _text("major", "major", "study {}", "physics,history,biology,music,law"),
           _number("age", "age", 18, 44, 1, "are {} years old", "greatest/smallest", "oldest/youngest"),
           _number("grade", "grade", 4.0, 10.0, 0.1),
           _date("enrolled", "enrolment date", "enrolled {}", 2019, 2023), person=True),
    _table("cities", "city/cities", _names("North,South,Port,New,Lower,Great", "Alba,Brant,Corin,Dover,Elms"),
           _text("region", "region", "are in the {} region", "coastal,northern,central,southern"),
           _number("population", "population", 12000, 900000, 1000, "have {#} inhabitants", "largest/smallest", additive=True),
           _number("area", "area", 20, 640, 5, "cover {} square kilometres", "largest/smallest")),
    _table("hospitals", "hospital", _names("Saint Mary,Riverside,Hillcrest,Eastgate,Oakwood,Lakeview", "Clinic,Hospital,Infirmary"),
           _text("county", "county/counties", "are in {}", "Kent,Essex,Devon,Norfolk"),
           _number("beds", "number of beds/numbers of beds", 40, 900, 10, "have {#} beds", additive=True),
           _number("doctors", "number of doctors/numbers of doctors", 12, 300, 3, "employ {#} doctors", additive=True),
           _year("opened", "opening year", "opened {}", 1890, 2015)),
    _table("phones", "phone", _names("Nova,Pixo,Zen,Orbit,Lumo", "One,Max,Lite,Pro", column="model"),
           _text("brand", "brand", "are made by {}", "Acorn,Veltro,Mirai,Sundal"),
           _number("storage", "storage size", 16, 1024, 16, "have {} GB of storage", "largest/smallest"),
           _number("price", "price", 90, 1400, 10, "cost {} euros", superlatives="most expensive/cheapest"),
           _date("released", "release date", "were released {}", 2018, 2023), with_id=False),
    _table("laptops", "laptop", _codes("A,D,K,S,V", "-11,-24,-37,-58,-90"),
           _text("processor", "processor", "use the {} processor", "Falcon,Heron,Kestrel,Osprey"),
           _number("memory", "memory size", 2, 128, 2, "have {} GB of memory", "largest/smallest"),
           _number("weight", "weight", 0.8, 3.6, 0.1, "weigh {} kilograms", "greatest/smallest", "heaviest/lightest"),
           _number("price", "price", 300, 3200, 20, "cost {} dollars", superlatives="most expensive/cheapest"), with_id=False),
    _table("shoes", "shoe model", _names("Trail,Road,Court,Cloud,Street", "Runner,Walker,Jumper,Racer"),
           _text("material", "material", "are made of {}", "leather,canvas,mesh,suede"),
           _text("color", "color", "come in {}", "black,white,green,brown"),
           _number("price", "price", 25, 220, 1, "cost {} dollars", superlatives="most expensive/cheapest"),
           _number("stock", "stock level", 3, 400, 3, additive=True)),
    _table("dogs", "dog", _names("Bella,Rex,Luna,Max,Daisy,Rocky,Milo,Ruby,Toby,Coco,Buddy,Lola,Ollie,Poppy,Bruno,Nala,Zeus,Honey"),
           _text("breed", "breed", "belong to the {} breed", "beagle,poodle,boxer,collie"),
           _text("owner", "owner", "are owned by {}", "Mr Hall,Ms Vance,Mr Quinn,Ms Orr,Mr Lund"),
           _number("weight", "weight", 4.0, 42.0, 0.5, "weigh {} kilograms", "greatest/smallest", "heaviest/lightest"),
           _date("born", "birth date", "were born {}", 2012, 2023)),
    _table("trees", "tree", _codes("T-,P-,W-", "01,02,03,04,05,06,07,08,09"),
           _text("species", "species/species", "belong to the {} species", "oak,birch,maple,pine,elm"),
           _text("park", "park", "grow in {}", "Hyde Park,Elm Park,Mill Park,Lake Park"),
           _number("height", "height", 3.0, 38.0, 0.5, "are {} metres tall", "greatest/smallest", "tallest/shortest"),
           _number("age", "age", 5, 260, 5, "are {} years old", "greatest/smallest", "oldest/youngest"), with_id=False),
    _table("rivers", "river", _names("Aldo,Benna,Corva,Dell,Erno,Fenn,Gavra,Hollin,Isk,Jarra,Kell,Lorne,Marra,Neva,Orro,Tamsin,Ull,Wey"),
           _text("country", "country/countries", "are in {}", "Poland,Chile,Kenya,Laos"),
           _number("length", "length", 60, 2400, 10, "are {} kilometres long", "greatest/smallest", "longest/shortest", True),
           _number("depth", "depth", 2.0, 60.0, 0.5, "are {} metres deep", "greatest/smallest", "deepest/shallowest"), with_id=False),
    _table("mountains", "mountain", _names("Mount,Grand,Old,High", "Aster,Boran,Calder,Drum,Elk,Frost"),
           _text("range", "range", "belong to the {} range", "Alder,Sierra,Morrow,Tarn"),
           _number("height", "height", 1200, 8200, 20, "are {} metres high", "greatest/smallest", "tallest/shortest"),
           _year("first_climbed", "ascent year", "were first climbed {}", 1820, 1990)),
    _table("museums", "museum", _names("Modern,Royal,City,Old Town,Harbour,National", "Gallery,Museum,Hall"),
           _text("city", "city/cities", "are in {}", "Lyon,Turin,Porto,Ghent,Malmo"),
           _text("type", "type", "are of type {}", "art,science,history,design"),
           _number("visitors", "visitor count", 5000, 900000, 1000, "receive {#} visitors", additive=True),
           _number("ticket_price", "ticket price", 3.0, 28.0, 0.5), with_id=False),
    _table("restaurants", "restaurant", _names("Blue,Copper,Happy,Little,Royal,Green", "Fork,Table,Spoon,Kettle"),
           _text("cuisine", "cuisine", "serve {} food", "Italian,Turkish,Korean,Peruvian,Lebanese"),
           _text("district", "district", "are in {}", "Soho,Camden,Chelsea,Brixton"),
           _number("rating", "rating", 2.1, 5.0, 0.1),
           _number("seats", "number of seats/numbers of seats", 14, 150, 2, "have {#} seats", additive=True)),
    _table("orders", "order", _codes("R,S,T,U", "1001,1017,1023,1048,1066"),
           _text("customer", "customer", "were placed by {}", "Ana Prado,Ivo Lang,Mei Tan,Kofi Boa,Lars Dahl"),
           _text("status", "status/statuses", "are {}", "pending,shipped,delivered,cancelled"),
           _number("amount", "amount", 15, 900, 5, "", "largest/smallest", additive=True),
           _date("order_date", "order date", "were placed {}", 2022, 2023), with_id=False),
    _table("invoices", "invoice", _codes("INV-", "101,105,112,118,123,130,137,141,149,156,160,168,172,185,190"),
           _text("client", "client", "were sent to {}", "Brightco,Halden,Norwest,Petra"),
           _number("total", "total", 120, 9800, 20, "", additive=False),
           _date("due_date", "due date", "are due {}", 2023, 2024), with_id=False),
    _table("albums", "album", _titles("Neon,Velvet,Lonely,Wild,Midnight,Plastic", "Hearts,Roads,Echoes,Rain,Mirrors"),
           _text("artist", "artist", "were recorded by {}", "The Larks,Juno Bay,Red Harbor,Sol Finch"),
           _text("label", "record label", "were released on {}", "Indigo,Tidal,Monarch"),
           _number("tracks", "track count", 5, 34, 1, "have {#} tracks", additive=True),
           _number("sales", "sales figure", 2000, 600000, 1000, "sold {#} copies"), quoted=True),
    _table("games", "game", _titles("Star,Dragon,Pixel,Robot,Castle,Turbo", "Quest,Arena,Legends,Rush"),
           _text("platform", "platform", "run on {}", "Windows,Linux,Android,Switch"),
           _text("genre", "genre", "are in the {} genre", "puzzle,racing,strategy,adventure"),
           _number("score", "review score", 31, 98, 1),
           _number("price", "price", 2.5, 70.0, 0.5, "cost {} dollars", superlatives="most expensive/cheapest"), quoted=True),
    _table("plants", "plant", _names("Aloe,Basil,Cactus,Daphne,Fern,Ginger,Hosta,Iris,Jasmine,Lavender,Mint,Orchid,Peony,Rosemary,Sage,Thyme,Violet"),
           _text("light", "light need", "need {} light", "full,partial,low,filtered"),
           _text("room", "room", "stand in the {}", "kitchen,bathroom,office,hallway"),
           _number("height", "height", 8, 180, 2, "are {} centimetres tall", "greatest/smallest", "tallest/shortest"),
           _number("price", "price", 2.5, 60.0, 0.5), with_id=False),
    _table("ships", "ship", _names("Northern,Ocean,Silver,Royal,Brave", "Star,Pearl,Wind,Queen"),
           _text("flag", "flag", "sail under the flag of {}", "Panama,Malta,Liberia,Japan"),
           _text("type", "type", "are of type {}", "tanker,cruise,cargo,research"),
           _number("length", "length", 60, 390, 2, "are {} metres long", "greatest/smallest", "longest/shortest"),
           _number("crew", "crew size", 9, 600, 3, "", "largest/smallest", additive=True)),
    _table("schools", "school", _names("Maple,Cedar,Hilltop,Valley,Station,Bishop", "Primary,High,Academy"),
           _text("district", "district", "are in the {} district", "east,west,north,south"),
           _number("pupils", "number of pupils/numbers of pupils", 80, 1500, 10, "have {#} pupils", additive=True),
           _number("teachers", "number of teachers/numbers of teachers", 6, 98, 1, "have {#} teachers", additive=True),
           _year("founded", "founding year", "were founded {}", 1880, 2012, "newest/oldest"), with_id=False),
    _table("houses", "house", _names("4,9,12,27,35", "Elm Street,Mill Lane,Park Road,High Street", column="address"),
           _text("town", "town", "are in {}", "Ashford,Barton,Clifton,Denby"),
           _number("price", "price", 120000, 950000, 5000, "cost {} dollars", superlatives="most expensive/cheapest"),
           _number("area", "floor area", 45, 320, 5, "", "largest/smallest"),
           _year("built", "construction year", "were built {}", 1890, 2022, "newest/oldest")),
    _table("concerts", "concert", _titles("Spring,Winter,Jazz,Folk,Opera,Open Air", "Night,Gala,Festival,Evening"),
           _text("venue", "venue", "take place at {}", "Arena One,Star Hall,The Dome,Pier Stage"),
           _number("ticket_price", "ticket price", 8, 140, 2),
           _number("audience", "audience size", 90, 12000, 10, "", "largest/smallest", additive=True),
           _date("held_on", "date", "were held {}", 2021, 2023), quoted=True),
    _table("stores", "store", _names("Market,Corner,Union,Central,Garden,Harbor", "Shop,Store,Outlet"),
           _text("state", "state", "are in {}", "Texas,Ohio,Utah,Maine,Iowa"),
           _text("manager", "manager", "are managed by {}", "Joy Park,Tim Rowe,Lea Stern,Abe Cruz"),
           _number("revenue", "revenue", 40000, 980000, 5000, "earn {} dollars", additive=True),
           _date("opened", "opening date", "opened {}", 2005, 2022)),
    _table("bicycles", "bicycle", _names("Swift,Breeze,Ridge,Comet,Urban", "100,200,300,500", column="model"),
           _text("type", "type", "are of type {}", "mountain,road,city,folding"),
           _number("gears", "number of gears/numbers of gears", 1, 30, 1, "have {#} gears"),
           _number("weight", "weight", 6.5, 19.0, 0.1, "weigh {} kilograms", "greatest/smallest", "heaviest/lightest"),
           _number("price", "price", 150, 4200, 10, "cost {} euros", superlatives="most expensive/cheapest")),
    _table("coffees", "coffee", _names("Morning,Dark,Golden,Velvet,Monsoon", "Blend,Roast,Reserve,Bean"),
           _text("origin", "country of origin/countries of origin", "come from {}", "Brazil,Ethiopia,Colombia,Vietnam"),
           _text("roast", "roast level", "have a {} roast", "light,medium,dark"),
           _number("price", "price", 6.0, 38.0, 0.5, "cost {} dollars", superlatives="most expensive/cheapest"),
           _number("score", "tasting score", 70.0, 96.0, 0.5), with_id=False),
    _table("cameras", "camera", _codes("C,F,L,X", "10,25,40,70,100"),
           _text("maker", "maker", "are made by {}", "Optika,Fotona,Lumex,Canto"),
           _number("megapixels", "resolution", 8, 102, 1, "have {#} megapixels"),
           _number("price", "price", 120, 5200, 20, "cost {} dollars", superlatives="most expensive/cheapest"),
           _date("launched", "launch date", "were launched {}", 2014, 2023), with_id=False),
    _table("farms", "farm", _names("Willow,Meadow,Stone,Sunny,Clover,Raven", "Farm,Ranch,Acres"),
           _text("crop", "crop", "grow {}", "wheat,barley,maize,potatoes,oats"),
           _text("county", "county/counties", "are in {}", "Dorset,Suffolk,Cumbria,Wiltshire"),
           _number("hectares", "size", 12, 900, 4, "cover {#} hectares", "largest/smallest", "largest/smallest"),
           _number("workers", "number of workers/numbers of workers", 2, 60, 1, "employ {#} workers", additive=True)),
    _table("libraries", "library/libraries", _names("Abbey,Bridge,Carter,Dale,Evergreen,Foster,Grange,Holly,Ivy,Kings,Linden,Moor,Newton,Park,Quarry,Rowan", "Library"),
           _text("town", "town", "are in {}", "Ripon,Selby,Whitby,Thirsk"),
           _number("volumes", "number of volumes/numbers of volumes", 4000, 250000, 500, "hold {#} volumes", additive=True),
           _number("members", "number of members/numbers of members", 200, 9000, 50, "have {#} members", additive=True),
           _date("renovated", "renovation date", "were renovated {}", 1998, 2022), with_id=False),
    _table("chairs", "chair", _names("Oslo,Milan,Kyoto,Paris,Delft", "Lounge,Stool,Rocker,Desk", column="model"),
           _text("wood", "type of wood/types of wood", "are made of {}", "oak,walnut,beech,ash"),
           _text("designer", "designer", "were designed by {}", "Eva Lind,Tom Arne,Gia Conti,Raf Stein"),
           _number("price", "price", 60, 1800, 10, "cost {} euros", superlatives="most expensive/cheapest"),
           _number("weight", "weight", 2.5, 24.0, 0.5, "weigh {} kilograms", "greatest/smallest", "heaviest/lightest")),
    _table("fish", "fish/fish", _names("Bubbles,Finn,Goldie,Nemo,Pearl,Ripple,Sparky,Splash,Squirt,Tango,Wanda,Zippy,Coral,Dory,Marlin,Jet"),
           _text("tank", "tank", "live in tank {}", "A,B,C,D"),
           _text("color", "color", "are {}", "orange,blue,yellow,striped"),
           _number("length", "length", 1.5, 32.0, 0.5, "are {} centimetres long", "greatest/smallest", "longest/shortest")),
    _table("repairs", "repair", _codes("J", "204,209,215,221,226,238,243,251,260,267,274,282,295"),
           _text("device", "device", "concern a {}", "printer,scanner,router,monitor,tablet"),
           _text("technician", "technician", "were done by {}", "Uma,Piet,Rolf,Selma"),
           _number("cost", "cost", 15, 480, 5, "cost {} dollars", superlatives="most expensive/cheapest", additive=True),
           _date("finished", "finish date", "were finished {}", 2022, 2024), with_id=False),
)

VALIDATION_TABLES = (
    _table("bridges", "bridge", _names("Iron,Stone,Long,Chain,Swan,Monk", "Bridge,Crossing,Span"),
           _text("river", "river", "cross the {}", "Danube,Rhine,Seine,Tagus"),
           _text("type", "type", "are of type {}", "arch,suspension,beam"),
           _number("length", "length", 40, 2100, 5, "are {} metres long", "greatest/smallest", "longest/shortest", True),
           _year("built", "construction year", "were built {}", 1750, 2010, "newest/oldest")),
    _table("cheeses", "cheese", _names("Old,Red,Alpine,Cave,Farmhouse", "Wheel,Blue,Cream,Crumble"),
           _text("milk", "type of milk/types of milk", "are made from {} milk", "cow,goat,sheep,buffalo"),
           _text("country", "country/countries", "come from {}", "France,Spain,Italy,Norway"),
           _number("aging_weeks", "aging time", 2, 150, 1, "age for {} weeks", "longest/shortest"),
           _number("fat", "fat content", 12.0, 60.0, 0.5), with_id=False),
    _table("tractors", "tractor", _codes("M,H,Z", "300,420,550,610,780,905"),
           _text("brand", "brand", "are made by {}", "Agrion,Ploughco,Terrex"),
           _number("horsepower", "horsepower rating", 30, 420, 5, "have {} horsepower"),
           _number("hours", "number of engine hours/numbers of engine hours", 100, 9000, 20, "have {#} engine hours", additive=True),
           _date("serviced", "service date", "were last serviced {}", 2021, 2023), with_id=False),
    _table("castles", "castle", _names("Black,White,Eagle,Wolf,Thorn,Raven", "Rock,Keep,Tower"),
           _text("duchy", "duchy/duchies", "are in the duchy of {}", "Varn,Lothar,Esmond"),
           _number("rooms", "number of rooms/numbers of rooms", 12, 300, 2, "have {#} rooms", additive=True),
           _number("towers", "number of towers/numbers of towers", 1, 24, 1, "have {#} towers", additive=True),
           _number("entry_fee", "entry fee", 2.0, 26.0, 0.5), with_id=False),
    _table("balloons", "hot-air balloon", _names("Sky,Cloud,Sun,Dawn,Zephyr", "Dancer,Drifter,Rider,Whale"),
           _text("pilot", "pilot", "are flown by {}", "Kit Moran,Ela Voss,Raj Anand,Bo Lindt"),
           _number("volume", "volume", 1200, 9800, 50, "", "largest/smallest"),
           _number("passengers", "passenger capacity/passenger capacities", 1, 28, 1, "carry {#} passengers", "largest/smallest", additive=True),
           _date("first_flown", "maiden flight date", "were first flown {}", 2008, 2022), with_id=False),
    _table("marathons", "marathon", _names("Coastal,Desert,Valley,Twin Lakes,Old Port,Summit", "Marathon,Run,Race"),
           _text("country", "country/countries", "take place in {}", "Morocco,Ireland,Canada,Greece,India"),
           _number("runners", "number of runners/numbers of runners", 200, 48000, 100, "have {#} runners", additive=True),
           _number("entry_fee", "entry fee", 20, 190, 5, "cost {} euros"),
           _date("race_day", "race date", "were run {}", 2022, 2023)),
    _table("beetles", "beetle specimen", _codes("BT-", "03,07,11,16,19,22,28,31,35,40,44,52,59,63"),
           _text("family", "family/families", "belong to the {} family", "stag,scarab,ladybird,weevil"),
           _text("collector", "collector", "were collected by {}", "Dr Aumont,Dr Hask,Dr Pell"),
           _number("length", "length", 3, 90, 1, "are {} millimetres long", "greatest/smallest", "longest/shortest"),
           _date("found", "collection date", "were collected {}", 1988, 2019), with_id=False),
)

TEST_TABLES = (
    _table("lighthouses", "lighthouse", _names("Gull,Seal,Fog,Storm,Anchor,Coral", "Point,Head,Reef"),
           _text("coast", "coast", "stand on the {} coast", "Irish,Baltic,Breton,Cornish"),
           _number("height", "height", 9, 80, 1, "are {} metres tall", "greatest/smallest", "tallest/shortest"),
           _number("light_range", "light range", 8, 45, 1, "", "longest/shortest"),
           _year("lit", "lighting year", "were first lit {}", 1780, 1960)),
    _table("volcanoes", "volcano/volcanoes", _names("Akar,Boro,Chuma,Etara,Fuego,Galun,Hekka,Irazo,Kilu,Lamo,Mayo,Ruang,Semu,Tolba,Ubina,Yasur"),
           _text("country", "country/countries", "are in {}", "Iceland,Ecuador,Indonesia,Japan"),
           _text("status", "status/statuses", "are {}", "active,dormant,extinct"),
           _number("elevation", "elevation", 300, 6200, 20, "rise {} metres above sea level"),
           _year("last_eruption", "eruption year", "last erupted {}", 1500, 2020), with_id=False),
    _table("submarines", "submarine", _names("Orca,Nautilus,Triton,Barracuda,Kraken", "I,II,III,IV"),
           _text("navy", "navy/navies", "serve in the {} navy", "Dutch,Swedish,Chilean,Greek"),
           _number("max_depth", "maximum depth", 150, 620, 10, "dive {} metres deep", "greatest/smallest"),
           _number("crew", "crew size", 18, 160, 2, "", "largest/smallest", additive=True),
           _date("commissioned", "commissioning date", "were commissioned {}", 1990, 2021)),
    _table("windmills", "windmill", _names("Miller,Baker,Sparrow,Barley,Rooster,Heather", "Mill,Tower,Sails"),
           _text("province", "province", "are in {}", "Zeeland,Utrecht,Drenthe,Limburg"),
           _text("use", "use", "are used for {}", "grinding,pumping,sawing"),
           _number("blade_span", "blade span", 14.0, 30.0, 0.5, "", "largest/smallest"),
           _year("built", "construction year", "were built {}", 1620, 1900, "newest/oldest")),
    _table("meteorites", "meteorite", _names("Alto,Bruna,Cardo,Dusk,Elbo,Farra,Gobi,Hoba,Ixil,Juro,Karst,Lunde,Mirny,Narva,Osmo,Pallas"),
           _text("class", "class/classes", "belong to the {} class", "iron,stony,mixed"),
           _text("found_in", "country of discovery/countries of discovery", "were found in {}", "Namibia,Oman,Australia,Argentina"),
           _number("mass", "mass/masses", 2.5, 900.0, 0.5, "weigh {} kilograms", "greatest/smallest", "heaviest/lightest", True),
           _year("fell", "fall year", "fell {}", 1790, 2015), with_id=False),
    _table("perfumes", "perfume", _names("Night,Amber,White,Desert,Secret", "Rose,Musk,Cedar,Bloom"),
           _text("house", "perfume house", "are sold by {}", "Maison Vey,Orlane Co,Bel Air,Duval"),
           _text("family", "fragrance family/fragrance families", "belong to the {} family", "floral,woody,citrus,oriental"),
           _number("price", "price", 18, 260, 2, "cost {} euros", superlatives="most expensive/cheapest"),
           _date("launched", "launch date", "were launched {}", 2001, 2022), with_id=False),
    _table("shipwrecks", "shipwreck", _names("Santa,Lady,Captain,Queen,Duke", "Isabel,Morgan,Helena,Drake"),
           _text("sea", "sea", "lie in the {}", "Baltic Sea,Black Sea,Red Sea,Coral Sea"),
           _number("depth", "depth", 6, 420, 2, "lie {} metres deep", "greatest/smallest", "deepest/shallowest"),
           _number("cargo_value", "cargo value", 5000, 990000, 5000, "", additive=True),
           _year("sank", "sinking year", "sank {}", 1590, 1945)),
    _table("fossils", "fossil", _codes("FX", "12,18,23,27,34,39,41,46,50,57,61,68,73,79,84"),
           _text("period", "geological period", "date from the {} period", "Jurassic,Triassic,Permian,Devonian"),
           _text("museum_room", "museum room", "are shown in the {}", "east wing,west wing,atrium,cellar"),
           _number("age", "age", 66, 410, 2, "are {} million years old", "greatest/smallest", "oldest/youngest"),
           _number("length", "length", 0.5, 24.0, 0.1, "are {} metres long", "greatest/smallest", "longest/shortest"), with_id=False),
    _table("violins", "violin", _codes("VN", "02,05,09,14,17,21,25,30,33,38,42,47,51,55"),
           _text("maker", "maker", "were built by {}", "Carlo Testa,Jan Rusk,Emil Hart,Luca Brio"),
           _text("varnish", "varnish/varnishes", "have a {} varnish", "red,golden,brown"),
           _number("value", "value", 3000, 480000, 1000, "", superlatives="most valuable/least valuable", additive=True),
           _year("made", "building year", "were built {}", 1690, 1960, "newest/oldest"), with_id=False),
    _table("clocks", "clock", _names("Abbot,Baron,Comtesse,Duchess,Ferry", "Chime,Pendulum,Dial,Cuckoo"),
           _text("style", "style", "are in the {} style", "baroque,rustic,modern,gothic"),
           _text("hall", "hall", "hang in the {} hall", "north,marble,mirror,garden"),
           _number("height", "height", 18, 240, 2, "are {} centimetres tall", "greatest/smallest", "tallest/shortest"),
           _date("last_wound", "winding date", "were last wound {}", 2023, 2024)),
    _table("parrots", "parrot", _names("Kiki,Paco,Rio,Mango,Skipper,Jade,Sunny,Captain,Zazu,Papaya,Echo,Limo,Figaro,Chico,Tiki,Pepper"),
           _text("species", "species/species", "belong to the {} species", "macaw,cockatoo,lorikeet,conure"),
           _text("aviary", "aviary/aviaries", "live in the {} aviary", "rainforest,island,canyon"),
           _number("words", "vocabulary size", 2, 160, 2, "know {#} words", "largest/smallest", additive=True),
           _number("wingspan", "wingspan", 20, 115, 1, "", "largest/smallest"), with_id=False),
    _table("caravans", "caravan", _names("Nomad,Rover,Drifter,Pilgrim,Voyager", "Duo,Family,Grande,Solo", column="model"),
           _text("campsite", "campsite", "are parked at {}", "Pine Cove,Sandy Bay,Deer Creek,Moonlake"),
           _number("berths", "number of berths/numbers of berths", 1, 24, 1, "have {#} berths", additive=True),
           _number("daily_rate", "daily rate", 30, 240, 5),
           _date("inspected", "inspection date", "were inspected {}", 2022, 2024)),
    _table("comets", "comet", _names("Arle,Biot,Cassin,Donato,Encke,Fulmar,Grigg,Holm,Iras,Jansk,Kopff,Lexa,Mellis,Neujm,Olbers"),
           _text("observer", "observer", "were discovered by {}", "Ines Kade,Yuri Sol,Ada Wirth,Tom Oki"),
           _number("orbit_years", "orbital period", 3.5, 160.0, 0.5, "", "longest/shortest"),
           _number("diameter", "diameter", 0.4, 30.0, 0.2, "", "largest/smallest"),
           _date("discovered", "discovery date", "were discovered {}", 1950, 2018)),
    _table("fountains", "fountain", _names("Dolphin,Lion,Nymph,Swan,Tortoise,Cherub", "Basin,Cascade,Spring"),
           _text("square", "square", "stand in {}", "Market Square,Dome Square,Mint Square,Rose Square"),
           _text("stone", "type of stone/types of stone", "are made of {}", "marble,granite,sandstone"),
           _number("jets", "number of jets/numbers of jets", 1, 60, 1, "have {#} jets", additive=True),
           _number("flow", "flow rate", 40, 900, 10), with_id=False),
)


def _linked(split: Split, child: Table, parent: Table, key: str, clause: str) -> Schema:
    return Schema(split, child, Link(parent, key, clause))


LINKED = (
    _linked("train",
            _table("novels", "novel", _titles("Burning,Quiet,Stolen,Glass,Seventh", "Harbor,Orchard,Oath,Mirror"),
                   _number("pages", "page count", 110, 800, 10, "have {#} pages"),
                   _year("year", "publication year", "were published {}", 1960, 2022), quoted=True, with_id=False),
            _table("authors", "author", _people(), _text("country", "country/countries", "are from {}", "Spain,Egypt,Brazil,Ireland"), person=True),
            "author_id", "were written by {}"),
    _linked("train",
            _table("songs", "song", _titles("Blue,Hold,Lost,Sweet,Falling", "Moon,Tonight,Summer,Thunder"),
                   _number("seconds", "length", 120, 420, 2, "last {} seconds", "longest/shortest"),
                   _number("plays", "play count", 1000, 900000, 1000, "have {#} plays"), quoted=True, with_id=False),
            _table("bands", "band", _names("The Owls,Static Bloom,Paper Kings,Night Tram,Gold Coast,Fern Hill"),
                   _text("genre", "genre", "play {} music", "rock,soul,folk,jazz")),
            "band_id", "are performed by {}"),
    _linked("train",
            _table("players", "player", _people(),
                   _text("position", "position", "play as a {}", "goalkeeper,defender,striker"),
                   _number("goals", "number of goals/numbers of goals", 0, 40, 1, "have {#} goals"), person=True, with_id=False),
            _table("teams", "team", _names("Rovers,Lions,United,Falcons,Wolves,Comets"),
                   _text("city", "city/cities", "are based in {}", "Leeds,Hull,Derby,Stoke")),
            "team_id", "play for {}"),
    _linked("train",
            _table("courses", "course", _titles("Basic,Applied,Modern,Advanced", "Algebra,Biology,Writing,Logic"),
                   _number("credits", "number of credits/numbers of credits", 1, 30, 1, "give {#} credits"),
                   _number("hours", "number of hours/numbers of hours", 10, 160, 2, "take {#} hours"), quoted=True, with_id=False),
            _table("teachers", "teacher", _people(), _text("faculty", "faculty/faculties", "belong to the {} faculty", "arts,science,law,medicine"), person=True),
            "teacher_id", "are taught by {}"),
    _linked("train",
            _table("products", "product", _names("Steel,Oak,Glass,Rubber", "Lamp,Shelf,Bowl,Mat,Clock"),
                   _number("price", "price", 4.5, 240.0, 0.5, "cost {} dollars"),
                   _number("stock", "stock level", 2, 300, 2), with_id=False),
            _table("suppliers", "supplier", _names("Norco,Baltrade,Ferrum,Isola,Quantis,Vireo"),
                   _text("country", "country/countries", "are based in {}", "Sweden,Turkey,Mexico,Poland")),
            "supplier_id", "are supplied by {}"),
    _linked("train",
            _table("patients", "patient", _people(),
                   _number("age", "age", 3, 92, 1, "are {} years old", "greatest/smallest"),
                   _date("admitted", "admission date", "were admitted {}", 2023, 2024), person=True, with_id=False),
            _table("doctors", "doctor", _names("Dr Amis,Dr Bloch,Dr Chen,Dr Dunn,Dr Eze,Dr Falk"),
                   _text("specialty", "specialty/specialties", "specialize in {}", "cardiology,surgery,oncology,neurology"), person=True),
            "doctor_id", "are treated by {}"),
    _linked("train",
            _table("rooms", "room", _names("Garden,Ocean,Rose,Tower,Sunset", "Suite,Double,Studio,Twin"),
                   _number("price", "price", 45, 420, 5, "cost {} euros"),
                   _number("floor", "floor number", 1, 30, 1), with_id=False),
            _table("hotels", "hotel", _names("Hotel Alba,Hotel Bristol,Hotel Cosmos,Hotel Dunes,Hotel Europa,Hotel Flora"),
                   _text("city", "city/cities", "are in {}", "Nice,Split,Faro,Bari")),
            "hotel_id", "belong to {}"),
    _linked("train",
            _table("paintings", "painting", _titles("Sleeping,Yellow,Stormy,Two", "Sailors,Fields,Horses,Windows,Lovers"),
                   _text("style", "style", "are in the {} style", "cubist,realist,abstract"),
                   _year("year", "painting year", "were painted {}", 1840, 1990), quoted=True, with_id=False),
            _table("galleries", "gallery/galleries", _names("Gallery Nord,Gallery Plaza,Gallery Verde,Gallery Kunz,Gallery Orion,Gallery Mint"),
                   _text("city", "city/cities", "are in {}", "Basel,Vienna,Madrid,Prague")),
            "gallery_id", "hang in {}"),
    _linked("train",
            _table("buses", "bus/buses", _codes("B", "11,14,19,22,27,31,36,40,48,53,59,64,70,77"),
                   _number("seats", "seat count", 18, 90, 2, "have {#} seats"),
                   _year("year", "construction year", "were built {}", 1995, 2023), with_id=False),
            _table("depots", "depot", _names("East Depot,West Depot,Canal Depot,Hill Depot,Park Depot,Dock Depot"),
                   _number("capacity", "capacity/capacities", 20, 200, 5, "", "largest/smallest")),
            "depot_id", "are kept at {}"),
    _linked("train",
            _table("wines", "wine", _names("Red,Old,Noble,Young,Rosy", "Valley,Slope,Harvest,Cellar"),
                   _text("grape", "grape", "are made from {}", "Merlot,Riesling,Malbec,Syrah"),
                   _number("price", "price", 5.0, 90.0, 0.5, "cost {} euros"), with_id=False),
            _table("vineyards", "vineyard", _names("Monte Sol,Clos Brun,Villa Aura,Casa Lume,Val Dore,Quinta Rey"),
                   _text("region", "region", "are in {}", "Rioja,Tuscany,Alsace,Douro")),
            "vineyard_id", "come from {}"),
    _linked("train",
            _table("apps", "app", _names("Note,Chat,Map,Fit,Cook", "ly,Hub,Wise,Go", joint=""),
                   _number("downloads", "download count", 1000, 800000, 1000, "have {#} downloads"),
                   _number("rating", "rating", 1.2, 5.0, 0.1), with_id=False),
            _table("developers", "developer", _names("Bitfarm,Codewell,Dotline,Evermade,Foxlab,Gridwork"),
                   _text("country", "country/countries", "are based in {}", "Estonia,Canada,India,Israel"),
                   _number("employees", "number of employees/numbers of employees", 3, 400, 1, "have {#} employees")),
            "developer_id", "were made by {}"),
    _linked("train",
            _table("horses", "horse", _names("Thunder,Misty,Blaze,Shadow,Juniper,Comet,Duchess,Rusty,Willow,Sabre,Pepper,Ginger,Atlas,Flint"),
                   _text("color", "color", "are {}", "gray,chestnut,black"),
                   _number("age", "age", 2, 28, 1, "are {} years old", "greatest/smallest"), with_id=False),
            _table("stables", "stable", _names("Oak Stable,Brook Stable,Hill Stable,Ridge Stable,Creek Stable,Elm Stable"),
                   _text("owner", "owner", "are owned by {}", "Mr Boyd,Ms Frost,Mr Kerr,Ms Lane")),
            "stable_id", "live at {}"),
    _linked("validation",
            _table("articles", "article", _titles("Hidden,Urban,Future,Simple", "Gardens,Trains,Cities,Habits,Foods"),
                   _number("words", "word count", 300, 6000, 50, "have {#} words"),
                   _date("printed", "printing date", "were printed {}", 2021, 2023), quoted=True, with_id=False),
            _table("magazines", "magazine", _names("Horizon,Lantern,Metro View,Open Field,Prism,Salt"),
                   _text("topic", "topic", "cover {}", "travel,science,cooking,sport")),
            "magazine_id", "appeared in {}"),
    _linked("validation",
            _table("ferries", "ferry/ferries", _names("Sea,Island,Harbor,Wave,Tide", "Lark,Spirit,Runner,Belle"),
                   _number("cars", "car capacity/car capacities", 10, 240, 2, "carry {#} cars"),
                   _number("speed", "speed", 11, 42, 1, "", "highest/lowest"), with_id=False),
            _table("operators", "operator", _names("Nordline,Bluewake,Coastway,Fjordex,Islink,Polarsea"),
                   _text("port", "home port", "are based in {}", "Bergen,Split,Palermo,Aarhus")),
            "operator_id", "are run by {}"),
    _linked("test",
            _table("musicians", "musician", _people(),
                   _text("instrument", "instrument", "play the {}", "cello,flute,oboe,viola"),
                   _number("concerts", "number of concerts/numbers of concerts", 3, 140, 1, "gave {#} concerts"), person=True, with_id=False),
            _table("orchestras", "orchestra", _names("Aurora Ensemble,Baltic Strings,Civic Players,Delta Sinfonia,Elgin Camerata,Fontana Winds"),
                   _text("town", "home town", "are based in {}", "Graz,Bergen,Dresden,Leuven")),
            "orchestra_id", "belong to {}"),
    _linked("test",
            _table("episodes", "episode", _titles("Strange,Lucky,Buried,Open", "Signals,Recipes,Treasure,Doors,Numbers"),
                   _number("minutes", "running time", 12, 95, 1, "last {} minutes", "longest/shortest"),
                   _date("aired", "air date", "aired {}", 2021, 2023), quoted=True, with_id=False),
            _table("podcasts", "podcast", _names("Deep Listen,Brain Fuel,Coffee Break,Law Talk,Pocket Past,Wild Ears"),
                   _text("host", "host", "are hosted by {}", "Gil Sato,Ruth Amar,Ned Oakes,Pia Wolf")),
            "podcast_id", "belong to {}"),
    _linked("test",
            _table("satellites", "satellite", _names("Helio,Terra,Luma,Vega", "1,2,3,4,5", joint="-"),
                   _text("orbit", "orbit", "are in a {} orbit", "polar,geostationary,low"),
                   _number("mass", "mass/masses", 90, 5200, 10, "weigh {} kilograms", "greatest/smallest"), with_id=False),
            _table("agencies", "agency/agencies", _names("Astra,Cosmica,Orbitek,Skylab One,Novaspace,Zenit Group"),
                   _text("home_country", "home country/home countries", "are based in {}", "Japan,Brazil,Norway,Canada")),
            "agency_id", "are operated by {}"),
    _linked("test",
            _table("telescopes", "telescope", _names("Argus,Cyclops,Deepsky,Falcon Eye,Galaxia,Hawk,Lynx,Mirador,Orion,Pisces,Quasar,Stargazer,Tycho,Zenith"),
                   _number("aperture", "aperture", 0.4, 11.0, 0.1, "", "largest/smallest"),
                   _year("installed", "installation year", "were installed {}", 1960, 2022), with_id=False),
            _table("observatories", "observatory/observatories", _names("Cerro Alto,Dark Mesa,Lone Peak,Mauna Blanca,Roca Fria,Tall Pines"),
                   _number("altitude", "altitude", 800, 5200, 50), with_id=True),
            "observatory_id", "are located at {}"),
    _linked("test",
            _table("gowns", "gown", _names("Ivory,Scarlet,Midnight,Peacock", "Dream,Waltz,Cascade,Rose,Veil"),
                   _text("fabric", "fabric", "are made of {}", "silk,velvet,satin,lace"),
                   _number("price", "price", 200, 6800, 50, "cost {} euros"), with_id=False),
            _table("designers", "designer", _people(), _text("studio_city", "studio city/studio cities", "work in {}", "Milan,Seoul,Lagos,Lisbon"), person=True),
            "designer_id", "were designed by {}"),
)

SCHEMAS: tuple[Schema, ...] = (
    *(Schema("train", table) for table in TRAIN_TABLES),
    *(Schema("validation", table) for table in VALIDATION_TABLES),
    *(Schema("test", table) for table in TEST_TABLES),
    *LINKED,
)
