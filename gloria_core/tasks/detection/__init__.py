"""Detection on a pretrained encoder: data, metrics, training."""
