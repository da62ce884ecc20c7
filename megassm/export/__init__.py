"""A trained model cut to budgets, as folders that open anywhere."""
