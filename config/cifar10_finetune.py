"""Decoder finetuning on CIFAR-10 against a small random discriminator, after config/cifar10_tokenizer.py: an experiment
without downloads, two CPU cores, minutes. It was tried on a tokenizer trained by L1 alone."""
init_from = "out/cifar10_tokenizer/checkpoint.pt"
out_dir = "out/cifar10_finetuned"
workers = 2
lpips_weight = 0.0
adversarial_weight = 0.75
discriminator_start = 0.1
adversarial_start = 0.3
discriminator_weights = "random"
discriminator_size = "96/4/3"
discriminator_input = 64
discriminator_augment = False  # features of random weights show little but colours and places
decoder_ema = 0.99
epochs = 1
batch_size = 64
learning_rate = 1e-3
min_learning_rate = 1e-4
warmup_epochs = 0.05
log_every = 20
save_every = 500
eval_every = 100
