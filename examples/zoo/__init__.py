"""Small trained models that ship with the project: their data, made in code, their training, and what each pass does to their answers."""
