// Where the page's data comes from: the document inside the page, or the server of `ril view`. Both have the same methods.

const LIMIT = 200; // the most groups of one call
const PICTURE = /^data:image\/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/=]*$/;

/** The report that is embedded in the page. */
class EmbeddedStore {
  constructor(text) {
    this.embedded = true;
    this.text = text;
    this.document = JSON.parse(text);
  }

  async report() {
    return this.document;
  }

  async groups(query, offset = 0, limit = LIMIT) {
    const key = query.toString();
    if (this.key !== key) {
      this.found = sorted(this.document.groups.filter((group) => matches(group, query)), query.get("sort"));
      this.key = key;
    }
    return { total: this.found.length, offset, groups: this.found.slice(offset, offset + limit) };
  }

  /** The address of a picture, or null where the document holds none that is safe to show. */
  image(hash, size) {
    const images = this.document.images ?? {};
    const image = Object.hasOwn(images, hash) ? images[hash] : null;
    const address = image && ((size === "full" && image.full) || image.thumb);
    return typeof address === "string" && PICTURE.test(address) ? address : null;
  }

  imageName(hash) {
    const images = this.document.images ?? {};
    return Object.hasOwn(images, hash) ? images[hash].name : "";
  }

  download() {
    save("report.json", this.text, "application/json");
  }

  watch() {}
}

/** The server of `ril view`, on the same origin. */
class ServedStore {
  constructor() {
    this.names = {};
  }

  async get(path) {
    const response = await fetch(path, { headers: { Accept: "application/json" } });
    const answer = await response.json().catch(() => ({}));
    if (!response.ok) throw new Error(answer.error ?? `${path.split("?")[0]} answered ${response.status}. Is ril view still running?`);
    return answer;
  }

  async report() {
    const report = await this.get("/api/report");
    this.names = report.images ?? {};
    return report;
  }

  groups(query, offset = 0, limit = LIMIT) {
    const whole = new URLSearchParams(query);
    whole.set("offset", offset);
    whole.set("limit", limit);
    return this.get(`/api/groups?${whole}`);
  }

  image(hash, size) {
    return `/api/image/${encodeURIComponent(String(hash).toWellFormed())}?size=${size}`;
  }

  imageName(hash) {
    return Object.hasOwn(this.names, hash) ? this.names[hash].name : "";
  }

  async download() {
    save("report.json", JSON.stringify(await this.get("/api/report")), "application/json");
  }

  /** Call back with the answer of /api/version whenever it has changed: every second while steps are read, else every five. */
  watch(changed) {
    let known = null;
    const ask = async () => {
      let indexing = false;
      try {
        const version = document.hidden ? known : await this.get("/api/version");
        if (JSON.stringify(version) !== JSON.stringify(known)) await changed(version, known);
        known = version;
        indexing = version?.indexing;
      } catch {
        announce("The server does not answer. Is ril view still running?");
      }
      setTimeout(ask, indexing ? 1000 : 5000);
    };
    ask();
  }
}

/** Fetch the groups of some ids, in that order; ids that are not there are left out. */
async function groupsById(store, ids) {
  const places = [...new Set(ids.map((id) => id.split("-").slice(0, 2).join("-")))];
  const answers = await Promise.all(places.map((place) => {
    const [run, step] = place.split("-");
    return store.groups(new URLSearchParams({ run, step_min: step, step_max: step }));
  }));
  const found = new Map(answers.flatMap((answer) => answer.groups).map((group) => [group.id, group]));
  return ids.map((id) => found.get(id)).filter(Boolean);
}
