"""Does training with the fused CUDA kernel differ from training with plain PyTorch?"""
