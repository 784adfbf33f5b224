"""The generator on CIFAR-10's latents, after config/cifar10_tokenizer.py: one GPU, or a long CPU run."""
tokenizer = "out/cifar10_tokenizer/checkpoint.pt"
out_dir = "out/cifar10_dit"
workers = 2
size = "384/12/6"
epochs = 200
batch_size = 256
learning_rate = 5e-4
decay_epoch = 100.0
warmup_steps = 500
ema_momentum = 0.999
save_every = 2000
sample_every = 2000
sample_cfg_scale = 2.0
