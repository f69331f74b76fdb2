"""Where documents come from. A source is a module with the documents themselves and a cheap key of what they are."""
