// Starts aimock on a free port with fixtures.json, prints its address, and ends with its stdin.
// GET /observed/aborted answers with the path of the next request whose client hangs up before
// the answer's end; POST /observed/restart forgets requests and how often fixtures were asked for.
import { createServer, loadFixtureFile } from "@copilotkit/aimock";

const waiting = [];

const observer = {
  async handleRequest(_request, response, path) {
    if (path === "/restart") {
      journal.clear();
      journal.clearMatchCounts();
      response.end("null");
    } else {
      response.writeHead(200, { "Content-Type": "application/json" });
      response.flushHeaders();
      waiting.push(response);
    }
    return true;
  },
};

const fixtures = loadFixtureFile(new URL("fixtures.json", import.meta.url).pathname);
const { server, journal, url } = await createServer(fixtures, { port: 0, chunkSize: 8 }, [
  { path: "/observed", handler: observer },
]);
server.on("request", (request, response) => {
  response.on("close", () => {
    if (response.writableFinished || request.url.startsWith("/observed")) return;
    for (const each of waiting.splice(0)) each.end(JSON.stringify(request.url));
  });
});
console.log(url);

process.stdin.on("end", () => process.exit(0)).resume();
