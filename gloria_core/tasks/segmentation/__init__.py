"""Segmentation on a pretrained encoder: data, losses, metrics, training."""
