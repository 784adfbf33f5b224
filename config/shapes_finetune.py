"""Decoder finetuning on the built-in shapes against a small random discriminator: two CPU cores, minutes, no download.
After config/shapes_tokenizer.py."""
init_from = "out/shapes_tokenizer/checkpoint.pt"
out_dir = "out/shapes_finetuned"
workers = 1
ssl_method = "none"
alpha = 1.0
lpips_weight = 0.0
adversarial_weight = 0.75
discriminator_start = 0.5
adversarial_start = 1.0
discriminator_weights = "random"
discriminator_size = "96/4/3"
discriminator_input = 64
discriminator_augment = False  # features of random weights show little but colours and places
decoder_ema = 0.99
epochs = 3
batch_size = 32
learning_rate = 1e-3
min_learning_rate = 1e-4
warmup_epochs = 0.1
weight_decay = 0.0
log_every = 50
save_every = 500
eval_every = 500
val_images = 500
