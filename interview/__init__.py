"""The interview: every question of the lab in one place, to be asked, scored, repeated and checked.

    python -m interview quiz | mock | code | anki | progress | pitch | check | index
"""
