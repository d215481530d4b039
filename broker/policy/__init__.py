"""What the administrator allows, and what each user may use."""
