"""What several tests share: inputs, cases, comparison, error budgets, checkpoints."""
