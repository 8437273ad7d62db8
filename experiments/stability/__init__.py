"""At which learning rates, and in which dtypes, does training stay stable?"""
