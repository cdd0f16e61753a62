"""A chat template of your own, in the Jinja of tokenizers' templates.

    llamahome train data.jsonl --set data.template=examples.custom_template:PLAIN

The assistant's part up to the end-of-turn token is what is trained. A package offers templates by name as entry points
of the group `llamahome.templates`; a path to a Jinja file works too.
"""

PLAIN = (
    "{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
