"""Training: the paper's mathematics, its networks, and the loop that DeepSpeed drives. The only room that imports deepspeed."""
