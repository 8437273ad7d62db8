"""Can bounded logits attend sharply: to one key of thousands?"""
