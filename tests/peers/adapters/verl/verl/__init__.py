"""verl's names for what refkl computes. A package proper: a namespace would lose to an installed verl."""
