"""Numbers that documents quote, and the checks that keep the documents true."""
