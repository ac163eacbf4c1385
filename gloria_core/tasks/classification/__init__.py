"""Classification: linear probe, fine-tuning, label policy and decisions."""
