"""LoRA: PEFT's adapters read (config, adapter), baked into a model (matching, bake), and made of
what a fine-tune changed (extract)."""
