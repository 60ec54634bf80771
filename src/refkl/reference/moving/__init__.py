"""How a reference moves towards its policy: averages, bias correction, LoRA products."""
