"""Where documents come from. A source is a module that gives documents, and a cheap key that identifies them."""
