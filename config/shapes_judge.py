"""A judge of the demo's samples, for eval.py --feature_net: a residual network that has learned the shapes' classes."""
data_dir = "shapes"
width = 16
epochs = 4
batch_size = 128
shift = 4
