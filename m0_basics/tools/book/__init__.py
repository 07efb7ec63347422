"""The book: all documents and notebooks as one static site, in both languages. `python -m m0_basics.tools.book`."""
