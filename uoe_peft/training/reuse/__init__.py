"""What is computed once and used again: states below the edited layer, and what the base model says."""
