"""The perceptual loss of config/shapes_tokenizer.py: a VGG that has learned the shapes' classes."""
data_dir = "shapes"
shapes_images = 8000
network = "vgg"
width = 16
out = "out/shapes_vgg.pt2"
epochs = 3
batch_size = 128
learning_rate = 0.2
