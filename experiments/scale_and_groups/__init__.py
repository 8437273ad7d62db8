"""Which scale does cosine-sim attention want, and do groups of the norm help?"""
