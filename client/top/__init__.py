"""``teemate top``: what the broker's enclaves and clients do, as it goes on.

``_model`` looks and makes rates of counts, ``_text`` prints a view once, ``_app`` is the full-screen one;
only that needs textual, and nothing else imports it.
"""
