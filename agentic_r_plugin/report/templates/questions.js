// Which questions flip between two cells, and both trajectories side by side. All text goes in as text, never as HTML.
function questionByQuestion({ benchmarks, lines }) {
  const at = (name) => document.getElementById(`diff-${name}`);
  const make = (tag, className, ...children) => {
    const node = document.createElement(tag);
    node.className = className;
    node.append(...children);
    return node;
  };
  const step = 10;
  const tags = {
    search: "Search", information: "Passages (environment)", correction: "Correction (environment)", answer: "Answer",
  };
  const options = (select, names, chosen) =>
    select.replaceChildren(...names.map((name, i) => new Option(name, i, false, i === chosen)));
  const chosen = () => {
    const benchmark = benchmarks[at("benchmark").value];
    return { benchmark, first: +at("first").value, second: +at("second").value };
  };

  // Name, badge, number of all questions of this kind (of a cell with itself: of those carried), and which are of it.
  function kinds({ benchmark: { cells, flips, questions, asked, right }, first, second }) {
    const alone = cells.length === 1 ? [right[0], asked[0] - right[0]] : [];
    const both = (a, b) => (question) => question.sides[first]?.right === a && question.sides[second]?.right === b;
    const named = first === second
      ? [["right", "good", both(true, true), alone[0]], ["wrong", "bad", both(false, false), alone[1]]]
      : [["wrong → right", "good", both(false, true), flips[first][second]],
         ["right → wrong", "bad", both(true, false), flips[second][first]]];
    return named.map(([name, badge, test, total]) => {
      const carried = questions.filter(test);
      carried.sort((a, b) => b.sides[second].searches - a.sides[second].searches);
      return { name, badge, carried, total: total ?? carried.length };
    });
  }

  function highlighted(text, gold) {
    const wanted = gold.filter((name) => name.trim()).sort((a, b) => b.length - a.length)
      .map((name) => name.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    if (!wanted.length) return [text];
    const found = new RegExp(`(?<![\\p{L}\\p{N}_])(${wanted.join("|")})(?![\\p{L}\\p{N}_])`, "giu");
    return text.split(found).map((part, i) => (i % 2 ? make("mark", "", part) : part));
  }

  function trajectory(name, side, gold) {
    if (!side) return make("div", "side", make("h3", "", name), "This cell's trajectory was not kept.");
    const small = make("small", "", `${side.searches} ${side.searches === 1 ? "search" : "searches"}, ${side.stop}`);
    const pieces = side.pieces.map(([kind, ...places]) => {
      const text = highlighted(places.map((place) => lines[place]).join("\n"), gold);
      return make("div", `piece ${kind}`, ...(tags[kind] ? [make("span", "tag", tags[kind])] : []), ...text);
    });
    if (side.answer === null) pieces.push(make("div", "piece answer", "No answer"));
    return make("div", side.right ? "side right" : "side", make("h3", "", name, small), ...pieces);
  }

  function row(question, open, { badge }, { benchmark, first, second }) {
    const places = first === second ? [first] : [first, second];
    const answers = places.map((place) => question.sides[place]?.answer ?? "no answer").join(" → ");
    const summary = make("summary", "", make("span", "q", question.question), make("span", "answers", answers));
    const details = make("details", `card question ${badge}`, summary);
    const fill = () => {
      if (details.childElementCount > 1) return;
      const sides = places.map((place) => trajectory(benchmark.cells[place], question.sides[place], question.gold));
      details.append(make("p", "gold", `Gold: ${question.gold.join(" / ")}`), make("div", "sides", ...sides));
    };
    details.addEventListener("toggle", fill);
    if (open) {
      fill();
      details.open = true;
    }
    return details;
  }

  function draw(kind) {
    const now = chosen(), all = kinds(now), { carried, total } = all[kind];
    at("kinds").replaceChildren(...all.map(({ name, total }, i) => {
      const button = make("button", "", name, make("b", "", total));
      button.type = "button";
      button.setAttribute("aria-pressed", i === kind);
      button.addEventListener("click", () => draw(i));
      return button;
    }));
    at("note").textContent = total === 0 ? "No such question."
      : carried.length < total ? `This page holds the trajectories of ${carried.length} of these ${total} questions; `
        + "agentic-r report with a larger num_trajectories holds more." : "";
    const more = () => {
      const shown = at("list").childElementCount, next = carried.slice(shown, shown + step);
      at("list").append(...next.map((question, i) => row(question, shown + i === 0, all[kind], now)));
      at("more").hidden = at("list").childElementCount === carried.length;
    };
    at("list").replaceChildren();
    at("more").onclick = more;
    more();
  }
  function choose() {
    const { cells, first } = benchmarks[at("benchmark").value];
    options(at("first"), cells, first[0]);
    options(at("second"), cells, first[1]);
    at("first").parentElement.hidden = cells.length < 2;
    at("second").parentElement.hidden = cells.length < 2;
    draw(0);
  }
  options(at("benchmark"), benchmarks.map(({ name }) => name), 0);
  at("benchmark").parentElement.hidden = benchmarks.length < 2;
  at("benchmark").addEventListener("change", choose);
  at("first").addEventListener("change", () => draw(0));
  at("second").addEventListener("change", () => draw(0));
  document.getElementById("diff").hidden = false;
  choose();
}
const data = document.getElementById("questions-data");
if (data) questionByQuestion(JSON.parse(data.textContent));
