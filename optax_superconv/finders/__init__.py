"""Which peak, and how high may a rate be at all?"""
