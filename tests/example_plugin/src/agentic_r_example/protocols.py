"""An agent protocol with tags and an instruction of another agent."""

from agentic_r_plugin.tags import TagProtocol

lookup = TagProtocol(
    name="lookup",
    description="Searches with <lookup>, answers with <final>.",
    instruction="Use <lookup>words</lookup> to search and <final>answer</final> to answer.\nQuestion: {question}\n",
    search_tag="lookup",
    answer_tag="final",
    information_tag="found",
    passage_form="{rank}. {title}: {text}",
    correction="\nPlease write <lookup>words</lookup> or <final>answer</final>.\n",
)
