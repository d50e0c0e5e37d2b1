"""Which value at which step?"""
