"""Decoder finetuning beside config/toy_tokenizer.py, against a discriminator on random weights."""
lpips_weight = 0.0
adversarial_weight = 0.75
discriminator_start = 0.1
adversarial_start = 0.3
discriminator_weights = "random"
discriminator_size = "16/4/2"
discriminator_input = 16
decoder_ema = 0.99
workers = 0
epochs = 1
batch_size = 16
warmup_epochs = 0.05
val_images = 50
log_every = 5
