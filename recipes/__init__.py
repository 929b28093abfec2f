"""Built-in recipes: one YAML file each, and the data that the project itself wrote for them."""
