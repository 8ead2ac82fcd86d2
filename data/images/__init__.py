"""Images with the class of each, for vision transformers: sources, augmentation and batches."""
