"""The cases, one module for each kind of question; `CASES` of each is found by the suite."""
