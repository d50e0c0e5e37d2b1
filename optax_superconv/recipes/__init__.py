"""Which optimizer, ready to use?"""
