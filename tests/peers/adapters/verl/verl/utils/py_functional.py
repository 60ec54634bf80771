"""verl's tests import this name; the one test that uses it is left out."""

append_to_dict = None
