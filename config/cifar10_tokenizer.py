"""The tokenizer on CIFAR-10 (files by runs/cifar10.py), after config/cifar10_vgg.py: give it --data_dir=FOLDER.

32 px images, latents 4 × 4 × 8: 24-fold compression, the paper's ratio; as in config/shapes_tokenizer.py the bottleneck
merges no tokens. docs/LOG.md says what it reached."""
out_dir = "out/cifar10_tokenizer"
image_size = 32
workers = 2
patch_size = 4
downsample = 8
latent_channels = 8
encoder = "128/4/4"
decoder = "128/4/4"
stc_depth = 1
alpha = 10.0  # Table 9: the value best for reconstruction; 1.0 was 1.5 dB behind after 1,000 steps
lpips_net = "out/cifar10_vgg.pt2"
lpips_weight = 0.15  # more costs PSNR, less costs samples (docs/LOG.md)
prototypes = 1024
head_hidden = 256
global_crop_size = 24  # staged, 3 × 3 tokens, whose positions are most of what iBOT learns (docs/LOG.md)
global_crop_scale = (0.3, 1.0)
local_crops = 0  # at 16 px, staged, they would have 2 × 2 tokens
teacher_temp = (0.02, 0.03)  # small images, short training: at 0.04 the teacher's output becomes uniform
teacher_temp_warmup_epochs = 0.5
teacher_momentum = 0.99  # fewer steps than ImageNet's 125,000
epochs = 2
optimizer = "muon"
learning_rate = 2e-3
muon_rate = 2.0
batch_size = 32
warmup_epochs = 0.04
freeze_prototypes_epochs = 0.2
log_every = 50
save_every = 500
eval_every = 500
val_images = 0
stats_images = 10000
