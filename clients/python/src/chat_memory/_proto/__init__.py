"""The generated messages and stubs. `generate.py` in the sources writes all modules in here."""
