"""The perceptual loss for CIFAR-10: a VGG that has learned its classes. Give it --data_dir=FOLDER."""
network = "vgg"
epochs = 4
learning_rate = 0.2
