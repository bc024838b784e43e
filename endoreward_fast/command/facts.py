"""Questions that any language model knows, for `endoreward demo` with a real model.

Each has one right answer and three wrong ones: whole sentences, as chat models reply, that differ in a word or a name.
"""

from __future__ import annotations

from ..pocket.quiz import Problem

_FACTS = """
geography | What is the capital of France? | The capital of France is {}. | Paris | Rome | Berlin | Madrid
geography | What is the capital of Japan? | The capital of Japan is {}. | Tokyo | Seoul | Beijing | Bangkok
geography | What is the largest ocean? | The largest ocean is the {}. | Pacific | Arctic | Atlantic | Indian
geography | Which continent is Egypt in? | Egypt is in {}. | Africa | Asia | Europe | Australia
geography | Which country is the city of Rome in? | Rome is in {}. | Italy | Spain | Greece | France
nature | What color is a clear sky? | A clear sky is {}. | blue | green | red | brown
nature | Which animal barks? | The animal that barks is the {}. | dog | cat | cow | duck
nature | What do bees make? | Bees make {}. | honey | milk | wool | bread
nature | How many legs does a spider have? | A spider has {} legs. | eight | two | four | ten
nature | What does a caterpillar become? | A caterpillar becomes a {}. | butterfly | spider | mouse | snake
nature | Which gas do people need to breathe? | People need {}. | oxygen | helium | hydrogen | methane
science | What is water made of? | Water is made of hydrogen and {}. | oxygen | carbon | iron | gold
science | Which planet do we live on? | We live on {}. | Earth | Mars | Venus | Saturn
science | What does the Earth go around? | The Earth goes around {}. | the Sun | the Moon | Mars | Jupiter
science | What is frozen water called? | Frozen water is called {}. | ice | steam | sand | salt
science | At what temperature does water boil? | Water boils at {} degrees Celsius. | 100 | 20 | 50 | 500
people | Who wrote Romeo and Juliet? | It was {}. | William Shakespeare | Charles Dickens | Virginia Woolf | Leo Tolstoy
people | Who found the law of gravity? | It was {}. | Isaac Newton | Charles Darwin | Marie Curie | Louis Pasteur
people | Who painted the Mona Lisa? | It was {}. | Leonardo da Vinci | Vincent van Gogh | Pablo Picasso | Claude Monet
people | Who was the first man on the Moon? | It was {}. | Neil Armstrong | Elvis Presley | Tom Hanks | Bill Gates
numbers | How many days are in a week? | There are {} days in a week. | seven | five | nine | twelve
numbers | What is 2 + 3? | 2 + 3 is {}. | 5 | 4 | 7 | 9
numbers | How many hours are in a day? | There are {} hours in a day. | 24 | 12 | 30 | 48
numbers | Which number comes after nine? | The number after nine is {}. | ten | six | eight | twelve
"""


def facts() -> list[Problem]:
    """Return the questions, grouped by task."""
    found = []
    for line in _FACTS.strip().splitlines():
        task, question, sentence, *words = (cell.strip() for cell in line.split("|"))
        right, *wrong = (sentence.format(word) for word in words)
        found.append(Problem(task, question, question, right, tuple(wrong)))
    return found
