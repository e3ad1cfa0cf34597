"""What `scripts/same_draws` is made of; it imports nothing of fedsample, whose modules may lie anywhere."""
