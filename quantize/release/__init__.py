"""What leaves for the hub: the model card of a run or a folder, and the upload."""
