"""`quantize eval`: a checkpoint beside the one that it was made from, measured where no run did."""
