"""Which links does a chain have?"""
