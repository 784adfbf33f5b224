"""The tokenizer on built-in shapes, after config/shapes_vgg.py: two CPU cores, minutes, no download.

32 px images, latents 4 × 4 × 8: 24-fold compression, the paper's ratio. The 16 tokens that staged compression leaves
of 64 are the latent's positions, so the bottleneck merges none; config/images64_tokenizer.py has both stages."""
data_dir = "shapes"
out_dir = "out/shapes_tokenizer"
image_size = 32
workers = 2
patch_size = 4
downsample = 8
latent_channels = 8
encoder = "128/3/4"
decoder = "128/4/4"
stc_depth = 1
alpha = 30.0  # above Table 9's 10, which is best for reconstruction: a run of minutes needs it
lpips_net = "out/shapes_vgg.pt2"  # in VGG-16's place, whose features mean little at 32 px
lpips_weight = 0.6  # less raises PSNR, but more sampled hexagons become discs (docs/LOG.md)
teacher_temp = (0.02, 0.03)  # small images, short training: at 0.04 the output becomes uniform
teacher_temp_warmup_epochs = 0.1
teacher_momentum = 0.99  # fewer steps than ImageNet's 125,000
prototypes = 512
head_hidden = 256
global_crop_size = 24  # staged, 3 × 3 tokens, whose positions are most of what iBOT learns (docs/LOG.md)
local_crop_size = 16
global_crop_scale = (0.5, 1.0)
local_crops = 0  # two global crops alone, iBOT's other recipe: about a fifth less time
local_crop_scale = (0.25, 0.5)
optimizer = "muon"
learning_rate = 2e-3
muon_rate = 2.0
shapes_images = 20800
epochs = 2
batch_size = 32
warmup_epochs = 0.04
freeze_prototypes_epochs = 0.1
log_every = 50
save_every = 500
eval_every = 500
val_images = 500
stats_images = 5000
