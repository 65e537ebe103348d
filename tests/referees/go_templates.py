"""Compare the templates for Ollama with Go's own text/template, for published chat templates.

    python tests/referees/go_templates.py FOLDER --go GO

FOLDER holds the *.jinja files of llama.cpp's source package (models/templates), GO is the path of
the Go command. A row is a chat template: its form and the number of conversations for which Go
gives the chat template's text, or the reason of the refusal. Exits with code 1 if a text differs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ollama_chats import CONVERSATIONS, TokenizerOfTemplate, refuses, with_default

from minitune.gguf.ollama.ollama_template import ollama_template

PROGRAM = """package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

type prompt struct {
	Template string
	Messages []message
}

func main() {
	var prompts []prompt
	if err := json.NewDecoder(os.Stdin).Decode(&prompts); err != nil {
		panic(err)
	}
	texts := []string{}
	for _, p := range prompts {
		var system []string
		for _, m := range p.Messages {
			if m.Role == "system" {
				system = append(system, m.Content)
			}
		}
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(p.Template))
		var text strings.Builder
		values := map[string]any{"System": strings.Join(system, "\\n\\n"), "Messages": p.Messages}
		if err := parsed.Execute(&text, values); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
"""


def render_in_go(go: str, prompts: list[dict]) -> list[str]:
    """Return the texts that Go's text/template makes of {"Template", "Messages"}."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "main.go"
        path.write_text(PROGRAM)
        process = subprocess.run(
            [go, "run", path], input=json.dumps(prompts), capture_output=True, text=True, check=True
        )
    return json.loads(process.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--go", default="go")
    arguments = parser.parse_args()
    differences = 0
    for path in sorted(arguments.folder.glob("*.jinja")):
        tokenizer = TokenizerOfTemplate(path.read_text(encoding="utf-8"))
        try:
            found = ollama_template(tokenizer, adds_bos=False)
        except ValueError as error:
            print(f"{path.stem:<52}refused  {error}")
            continue
        chats = [chat for chat in CONVERSATIONS if not refuses(tokenizer, chat)]
        prompts = [
            {"Template": found.text, "Messages": with_default(chat, found.system)} for chat in chats
        ]
        texts = render_in_go(arguments.go, prompts)
        expected = [tokenizer.template.render(chat, add_generation_prompt=True) for chat in chats]
        equal = sum(text == wanted for text, wanted in zip(texts, expected, strict=True))
        differences += len(chats) - equal
        notes = "; ".join(found.notes)
        print(f"{path.stem:<52}{found.form:<9}{equal} of {len(chats)} equal  {notes}")
    return int(differences > 0)


if __name__ == "__main__":
    sys.exit(main())
