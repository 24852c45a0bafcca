"""A model behind HTTP, for one person or a few at a desk: sessions of clicks, a queue, a log.

    app = create_app(model, checkpoint=digest, cases=cases, log=AuditLog(path))

`app.py` says which addresses there are, `guard.py` who may call them, `desk.py` what they do, and
`audit_log.py` what is kept of it. `page/` is the page. Needs the extra [ui].
"""
