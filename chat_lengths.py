"""stub"""
CHAT_ROWS = "1 1 | 1 1"
