"""python -m flash_cosine_sim_attention: what is used, what is missing."""

from .report import describe

if __name__ == "__main__":
    print(describe())
