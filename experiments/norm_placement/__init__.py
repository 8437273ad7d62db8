"""Is the gain of cosine-sim attention the ability to use post-norm?"""
